"""The custom resources as typed values: fields, defaults, rules that cross fields, and the CRDs made from them."""
