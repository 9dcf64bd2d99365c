"""Several questions about one context, asked one after the other over the same cache."""
