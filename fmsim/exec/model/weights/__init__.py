"""How a model's weights are read, held and made up."""
