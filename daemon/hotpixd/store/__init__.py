"""What survives a power cut: the ledger, the spool and the generations."""
