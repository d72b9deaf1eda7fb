"""What each way to serve users costs, and how good its text is: the stored comparison and its figures."""
