"""Which heads need far keys, query by query, told without looking at them: QAdA."""
