"""Important tokens and diverse ones: the attentive matched, the others clustered."""
