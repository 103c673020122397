"""What a nano answers and how restless its selection is, measured; its traces recorded."""
