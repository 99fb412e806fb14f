"""What is observed: collapse metrics of features from anywhere."""
