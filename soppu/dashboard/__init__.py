"""The live page of a system: users, versions, what is published, traffic, runs. It changes nothing."""
