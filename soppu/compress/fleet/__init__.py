"""The adapters of many users, checked and read a batch of users at a time."""
