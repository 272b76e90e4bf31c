"""Operations with more than one implementation: in each folder `ref` defines, the others accelerate, `api` chooses."""
