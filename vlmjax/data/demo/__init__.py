"""The demo's data: small tasks made on the fly from real icons, digits, words, tables and clips."""
