"""AttSets: a weight for every token and every channel, and FASet, which trains it."""
