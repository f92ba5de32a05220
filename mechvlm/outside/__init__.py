"""What comes from outside: names and text that somebody else wrote, and checksums of our files."""
