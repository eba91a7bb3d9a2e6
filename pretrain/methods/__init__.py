"""What is learned, behind one seam (`base.Method`): a folder each, see README.md."""
