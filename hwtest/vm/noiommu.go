package vm

import "context"

func (k *Kernel) buildNoIOMMU(ctx context.Context, cache string) error {
	return &MissingError{What: "not built"}
}
