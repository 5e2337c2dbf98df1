"""One page that shows a run, or several beside each other, and needs nothing but itself."""
