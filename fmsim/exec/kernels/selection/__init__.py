"""What a step selects by score: index scores of every entry, the best k of them."""
