"""DeepLab: scores of a dense net, read at several distances and snapped to the edges of the image."""
