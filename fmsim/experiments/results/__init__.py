"""What commands write and read back: folders of results, and files of rows."""
