"""Other libraries' formats and layers. Nothing here is imported before it is asked for."""
