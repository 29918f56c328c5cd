"""What training and evaluation read from a cache: the run's specification, its pairs and their features."""
