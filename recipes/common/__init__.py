"""The data, models and tables that the recipes and the demo share."""
