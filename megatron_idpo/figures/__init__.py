"""All figures: charts for the report page (SVG) and for files (PNG, SVG), in one style."""
