"""Models, head sets and reference code that tests share."""
