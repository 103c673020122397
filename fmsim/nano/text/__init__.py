"""nano's text: Debian packages read, split and made tokens; its tokenizer and words made."""
