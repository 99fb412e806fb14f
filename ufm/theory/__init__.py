"""What is known: closed forms and certificates."""
