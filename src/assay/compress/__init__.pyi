# Made from the cards by 'make generate'.
