"""Operations in several implementations: `ref` defines, the others accelerate, `api` chooses."""
