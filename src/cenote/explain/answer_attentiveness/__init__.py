"""How much of a language model's probability goes to the listed answers, and what that can have changed."""
