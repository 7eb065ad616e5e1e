"""DiCoSA: texts and videos compared concept by concept."""
