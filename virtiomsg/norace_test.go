//go:build !race

package virtiomsg

// modelRounds is how often the model is run, with 100 worlds each unless -rapid.checks says
// otherwise.
const modelRounds = 20
