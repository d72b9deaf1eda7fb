"""The adapters a server holds, in memory and on disk."""
