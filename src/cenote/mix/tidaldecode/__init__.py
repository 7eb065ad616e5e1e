"""TidalDecode: the positions with the highest scores in one layer are read by the layers behind it."""
