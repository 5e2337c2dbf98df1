"""How models compare: layer curves, answers and who judges them, H4, and the page that shows it."""
