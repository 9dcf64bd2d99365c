"""`harness reproduce diffusion`: may a token be dropped once what it said has spread?"""
