"""SlotCon: semantic grouping, and learning it from images without labels."""
