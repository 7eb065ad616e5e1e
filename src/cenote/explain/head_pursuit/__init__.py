"""Which heads write about a concept: heads' outputs rebuilt of the words' directions, and heads turned up, off or round."""
