"""Modules made of genkern's ops."""
