"""Data with no download: digits, a folder of images, text; and the order in which it is seen."""
