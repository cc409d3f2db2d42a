"""Other designs behind the same API, each as its users would set it up."""
