"""Files in, plain tables and arrays out: the only code that knows a file format."""
