"""What the tables of the pages are made with."""
