"""Assignment: logical experts to slots, what it is worth, and what is left of it when ranks are lost."""
