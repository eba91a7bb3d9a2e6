"""What a recipe sees of an image: parameters drawn, and pixels made of them."""
