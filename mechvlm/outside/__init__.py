"""Names and text that somebody else wrote; checksums; folders that are written whole."""
