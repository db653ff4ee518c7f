"""How fast it is, where the time goes, and which configuration is best."""
