"""Scans on more than one machine: shots are decoded and added up by Dask's workers, and followed in order here."""
