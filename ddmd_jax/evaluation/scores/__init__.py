"""Published scorers of pictures: their pixels, their tokens, their networks, their formulas."""
