"""How far a head's top tokens stand apart from the others, how many can be told apart, and what no normaliser can exceed."""
