"""Where metrics and progress are reported."""
