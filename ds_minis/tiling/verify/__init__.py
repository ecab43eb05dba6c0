"""What a module does, asked of its behaviour: is it token-wise, and for how long does the answer hold?"""
