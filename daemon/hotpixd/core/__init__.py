"""The statistics. Pure: arrays and settings in, records out; no files, clocks, threads or terminals."""
