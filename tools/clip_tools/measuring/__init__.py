"""How exact it is, how fast, where the time goes, and which configuration is best."""
